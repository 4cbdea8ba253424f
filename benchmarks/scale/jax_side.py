"""JAX over a mesh: the devices that are there, or virtual ones, which are parts of this machine's processor."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks.scale import programs
from benchmarks.scale.cases import ONE, Case, asked, inputs, rows

Array = Any


class JAXSide:
    """A process with so many devices; JAX has to be told of virtual ones before it is imported."""

    def __init__(self, devices: int, virtual: bool) -> None:
        if virtual:
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
            os.environ |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        import jax

        self.jax, self.virtual = jax, virtual
        self.devices = jax.devices()[:devices]
        self.calls: dict[Case, Callable[[], Any]] = {}
        first = self.devices[0]
        self.about = {"platform": first.platform, "device": first.device_kind, "count": len(jax.devices())}
        self.about["version"] = jax.__version__

    def run(self, job: str, *arguments: Any) -> Any:
        """The answer to a job, which is the name of a method."""
        return getattr(self, job)(*arguments)

    def program(self, case: Case, shapes_only: bool = False) -> tuple[Callable[..., Any], list[Any], ExitStack]:
        """A function to compile, its arguments, and what has to be in force meanwhile."""
        from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

        from anyattention import config, dot_product_attention

        jax, scope, options = self.jax, ExitStack(), asked(case)
        if case.exchange in ("ring", "gather"):
            options["sequence_axis"] = "seq"
            scope.enter_context(config(exchange=case.exchange))
        else:
            options["implementation"] = case.implementation
        place: Any = SingleDeviceSharding(self.devices[0])
        if case.exchange != ONE:
            mesh = jax.make_mesh((case.devices,), ("seq",), (AxisType.Auto,), devices=self.devices[: case.devices])
            scope.enter_context(jax.set_mesh(mesh))
            place = NamedSharding(mesh, PartitionSpec(None, "seq"))
        if shapes_only:
            arrays = [jax.ShapeDtypeStruct(case.shape, case.dtype, sharding=place) for _ in range(3)]
        else:
            dtype = jax.numpy.dtype(case.dtype)
            arrays = [jax.device_put(x.astype(dtype), place) for x in inputs(case)]

        def call(*arrays: Array) -> Array:
            return dot_product_attention(*arrays, **options)

        def loss(*arrays: Array) -> tuple[Array, Array]:
            output = call(*arrays)
            return (output.astype("float32") ** 2).sum(), output

        def both(*arrays: Array) -> list[Array]:
            gradients, output = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
            return [output, *gradients]

        return both if case.gradient else lambda *x: [call(*x)], arrays, scope

    def explained(self, case: Case) -> str:
        """How the sequence is exchanged, as `explain` says it."""
        from anyattention import explain

        _, arrays, scope = self.program(case, shapes_only=True)
        with scope:
            return explain(*arrays, **asked(case), sequence_axis="seq").reasons[-1]

    def compiled(self, case: Case) -> dict[str, Any]:
        """Memory a device, collectives, and bytes sent a turn, of a program that does not run."""
        function, arrays, scope = self.program(case, shapes_only=True)
        with scope:
            start = time.perf_counter()
            program = self.jax.jit(function).lower(*arrays).compile()
            seconds = time.perf_counter() - start
        memory, text = program.memory_analysis(), program.as_text()
        found = {"temporaries_mib": memory.temp_size_in_bytes / 2**20, "compile_seconds": seconds}
        found["outputs_mib"] = memory.output_size_in_bytes / 2**20
        sent = programs.turns(text)
        columns = 2 * case.length // case.devices * case.heads * case.depth
        least = columns * self.jax.numpy.dtype(case.dtype).itemsize
        return found | {"collectives": programs.collectives(text), "sent_a_turn": sent, "least_a_turn": least}

    def prepare(self, case: Case) -> dict[str, Any]:
        """Some rows of the output and of the query's gradient, and some of the other gradients."""
        function, arrays, scope = self.program(case)
        with scope:
            program = self.jax.jit(function).lower(*arrays).compile()
        self.calls[case] = lambda: self.jax.block_until_ready(program(*arrays))
        found = [np.asarray(x[:, rows(case)].astype("float32")) for x in self.calls[case]()]
        return {"rows": found[:2], "columns": found[2:]}

    def seconds(self, case: Case) -> float:
        """Of one call of the case that is prepared."""
        start = time.perf_counter()
        self.calls[case]()
        return time.perf_counter() - start

    def clear(self) -> None:
        """Forget the cases that were prepared."""
        self.calls = {}

    def counted(self, case: Case) -> dict[int, int]:
        """How many logits each device computes in the forward pass, counted tile by tile while it runs."""
        from anyattention._src.tiles import passes

        jax, counts, real = self.jax, dict.fromkeys(range(case.devices), 0), passes.tile_logits

        def add(device: Any, size: int) -> None:
            counts[int(device)] += size

        def tile_logits(tiling: Any, tile: Any, visible: Any, again: bool) -> Any:
            found = real(tiling, tile, visible, again)
            size = int(np.prod(found[0].shape))
            device = 0 if case.exchange == ONE else jax.lax.axis_index("seq")
            jax.debug.callback(lambda device: add(device, size), device)
            return found

        passes.tile_logits = tile_logits
        jax.clear_caches()
        try:
            function, arrays, scope = self.program(case)
            with scope:
                jax.block_until_ready(jax.jit(function)(*arrays))
                jax.effects_barrier()
        finally:
            passes.tile_logits = real
            jax.clear_caches()
        return counts
