for (const button of document.querySelectorAll("button.copy")) {
  const code = button.parentElement.querySelector("code");
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}
const show = () => {
  const found = /^#t\d+-[cg]\d+$/.test(location.hash) && document.querySelector(location.hash);
  if (found) { found.open = true; found.scrollIntoView(); }
};
addEventListener("hashchange", show);
show();
