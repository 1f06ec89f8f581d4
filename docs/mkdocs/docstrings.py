"""Docstrings in the Hugging Face form as Markdown: sections become lists, and [`Name`] a link where there is one."""

import inspect
import re

import griffe

import hf_ensemble


def identifier(name: str) -> str:
    """Where the reference finds a public name."""
    module = getattr(hf_ensemble, name).__module__
    # callbacks/ lies beside the package.
    return f"{module.removeprefix('hf_ensemble.') if 'callbacks' in module else module}.{name}"


# With or without a target of its own, which need not have a page.
_REFERENCE = re.compile(r"\[`([\w.]+)`\](?:\[[\w.]+\])?(?!\()")


_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):$")
# An entry of a section: a name with its type, or a type alone.
_ENTRY = re.compile(r"^    (?! )(\*{0,2}\w[\w, ]*?)?(?: ?\((.+?)\))?(`.+?`)?:(?: (.*))?$")


def as_markdown(docstring: str) -> str:
    """A docstring whose sections are lists."""
    lines, section = [], None
    for line in docstring.splitlines():
        header = _SECTION.match(line)
        if header:
            section = header[1]
            lines += ["", f"**{section}**", ""]
        elif line.startswith("    ") and section not in (None, "Example"):
            entry = _ENTRY.match(line)
            if entry:
                name, kind, alone, text = entry.groups()
                title = alone or (f"`{name}`" + (f" ({kind})" if kind else ""))
                lines.append(f"- {title}: {text or ''}".rstrip())
            else:
                # The rest of an entry, as deep as its list asks for.
                lines.append("    " + line.strip())
        else:
            section = section if not line else None
            lines.append(line)
    return "\n".join(lines)


class HuggingFaceForm(griffe.Extension):
    """Rewrites docstrings before they are rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = as_markdown(inspect.cleandoc(obj.docstring.value))
            obj.docstring.value = _REFERENCE.sub(lambda found: self._link(found[1], obj), text)

    def _link(self, name: str, obj: griffe.Object) -> str:
        first = name.partition(".")[0]
        if first in hf_ensemble.__all__:
            return f"[`{name}`][{identifier(first)}{name.removeprefix(first)}]"
        # A documented method of the same class.
        owner = obj if obj.is_class else obj.parent
        member = owner.members.get(name) if owner is not None and owner.is_class else None
        if member is not None and member.is_function and member.docstring is not None:
            return f"[`{name}`][{owner.path}.{name}]"
        return f"`{name}`"
