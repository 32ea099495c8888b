"""Extension of Griffe, which reads the docstrings for the site: where modules are installed, examples, links."""

import re
from pathlib import Path

import griffe


class Docstrings(griffe.Extension):
    """Makes of this package's docstrings what mkdocstrings renders."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: object) -> None:
        if pkg.path != "fsam_triton":
            return
        # Griffe follows folders, not the package-dir of setuptools.
        root = Path(__file__).parents[1]
        pkg.set_member("kernels", griffe.load("kernels", search_paths=[root], docstring_parser=loader.docstring_parser))
        rewrite(pkg)


def rewrite(obj: griffe.Object) -> None:
    """Rewrite the docstrings of an object and of all in it."""
    for member in obj.members.values():
        if not member.is_alias:
            rewrite(member)
    if obj.docstring:
        # What stands below "Example:" would be text, not code.
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
        text = re.sub(r"^( +)((?:[*\w]+, )+[*\w]+): (.*(?:\n\1 .*)*)", one_by_one, text, flags=re.M)
        obj.docstring.value = re.sub(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)", lambda name: link(obj, name[1]), text)


def one_by_one(entry: re.Match[str]) -> str:
    """An entry of several arguments ("first, second: as that") as an entry for each."""
    indent, names, text = entry.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


def link(obj: griffe.Object, name: str) -> str:
    """The name as code, with a link to what it means within the object, should a page show that."""
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:
        return f"`{name}`"
    return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'
