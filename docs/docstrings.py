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
        for module in pkg["optim"].modules.values():
            for optimizer in module.classes.values():
                show_options(optimizer, pkg["optim.optimizer.FusedOptimizer"])
        rewrite(pkg)


def show_options(optimizer: griffe.Class, base: griffe.Class) -> None:
    """Show what ``**options`` stands for: the arguments that the base has besides."""
    init = optimizer.members.get("__init__")
    if init is None or "options" not in init.parameters:
        return
    own = {parameter.name for parameter in init.parameters}
    del init.parameters["options"]
    # A class with a rule of its own has all that the rule takes.
    own |= {"params"} if "rule" in own else {"params", "rule", "hyper"}
    for parameter in base.members["__init__"].parameters:
        if parameter.name not in own and not parameter.name.startswith("_"):
            init.parameters.add(parameter)
    text, entries = optimizer.docstring.value, entries_of(base.docstring.value)
    (entry,) = [entry for entry in entries_of(text) if entry.startswith("    **options:")]
    shown = [one for one in entries if not own.issuperset(names_of(one))]
    optimizer.docstring.value = text.replace(entry, "".join(shown))


def entries_of(docstring: str) -> list[str]:
    """What stands below "Args:", argument by argument."""
    arguments = re.search(r"^Args:\n((?: .*\n)*)", docstring, flags=re.M)[1]
    return re.findall(r"^ {4}[*\w].*\n(?: {8}.*\n)*", arguments, flags=re.M)


def names_of(entry: str) -> list[str]:
    """The arguments that an entry is about."""
    return re.findall(r"\w+", entry.split(":")[0])


def rewrite(obj: griffe.Object) -> None:
    """Rewrite the docstrings of an object and of all in it."""
    for member in obj.members.values():
        if not member.is_alias:
            rewrite(member)
    if obj.docstring:
        # What stands below "Example:" would be text, not code.
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
        text = re.sub(r"^( +)((?:[*\w]+, )+[*\w]+): (.*(?:\n\1 .*)*)", one_by_one, text, flags=re.M)
        # Formulas stand indented, before the sections. Links in them would be shown as they are written.
        head, section, rest = re.match(r"(.*?)(^[A-Z]\w+:$|\Z)(.*)", text, flags=re.M | re.S).groups()
        lines = [line if line.startswith("    ") else linked(obj, line) for line in head.splitlines(keepends=True)]
        obj.docstring.value = "".join(lines) + section + linked(obj, rest)


def one_by_one(entry: re.Match[str]) -> str:
    """An entry of several arguments ("first, second: as that") as an entry for each."""
    indent, names, text = entry.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


def linked(obj: griffe.Object, text: str) -> str:
    """The text with links from the names in it."""
    return re.sub(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)", lambda name: link(obj, name[1]), text)


def link(obj: griffe.Object, name: str) -> str:
    """The name as code, with a link to what it means within the object, should a page show that."""
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:
        return f"`{name}`"
    return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'
