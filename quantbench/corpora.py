"""Stub while the real one is being written elsewhere; not to be committed."""

NAMES = ("wikipedia", "code", "lambada", "arc-easy", "hellaswag", "piqa")


def documents(name, cache):
    raise ValueError("stub")


def rows(name, cache):
    raise ValueError("stub")


def digest(name, cache):
    return "0" * 64


def get(names, cache, say):
    raise ValueError("stub")


def status(cache):
    return {}
