"""A script is no test."""

collect_ignore = ["keras_answers.py"]
