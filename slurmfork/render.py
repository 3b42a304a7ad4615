"""Rendering of the batch script from a template: ours, or a user's that extends one of ours.

Pure, but for reading templates. Every value passes a filter that makes it safe where it stands; a template
that forgets one is refused. No secret's value comes near a script.
"""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from slurmfork.backends import slurm_options
from slurmfork.errors import Problem, SlurmforkError, SpecError

if TYPE_CHECKING:
    from slurmfork.plan import Request
    from slurmfork.spec import Spec

TEMPLATES = Path(__file__).with_name("templates")
_OURS = {"slurm": "sbatch.sh.j2", "local": "local.sh.j2", "ray": "ray.sh.j2"}
_END = "END_OF_SETUP"
EPILOG_GRACE_S = 2
EPILOG_LIMIT_S = 20


def render(
    spec: Spec,
    *,
    run_id: str,
    run_dir: Path,
    request: Request,
    python: str,
    package: Path,
    template: Path | None = None,
) -> str:
    """The batch script's text.

    ``template``, else the spec's ``slurm.template``, is a user's own. Raises SpecError for a value that the
    script cannot hold, and for what is wrong in a user's template, with file and line.
    """
    own = template or (Path(spec.slurm["template"]) if spec.slurm.get("template") else None)
    values = {
        "spec": spec,
        "run_id": run_id,
        "run_dir": run_dir,
        "python": python,
        "package": package,
        "request": request,
        "options": slurm_options.options(spec, request, run_dir) if spec.backend == "slurm" else [],
        "setup": spec.setup.strip("\n"),
        "setup_end": _end_of(spec.setup),
    }
    try:
        text = _environment(own).get_template(str(own) if own else _OURS[spec.backend]).render(values)
    except jinja2.TemplateNotFound as error:
        wanted = str(error.name)
        file = str(own) if own and wanted != str(own) else None
        raise SpecError([Problem(f"there is no template {wanted}", file=file)]) from None
    except jinja2.TemplateSyntaxError as error:
        raise SpecError([Problem(str(error.message), line=error.lineno, file=error.filename)]) from None
    except SlurmforkError:
        raise
    except Exception as error:  # a template can do whatever Python can
        file, line = _place(error)
        words = str(error) if isinstance(error, (jinja2.TemplateError, Unfit)) else f"{type(error).__name__}: {error}"
        raise SpecError([Problem(words, line=line, file=file)]) from None
    text = text.lstrip()  # what stands before a template's {% extends %} comes out too, a blank line mostly
    if not text.startswith("#!"):
        raise SpecError([Problem("the script that it makes does not begin with #!, as Slurm wants it", file=str(own))])
    return text


def epilog(*, python: str, package: Path) -> str:
    """The script that a site may have Slurm run on each node at the end of each job."""
    values = {"python": python, "package": package, "grace": EPILOG_GRACE_S, "limit": EPILOG_LIMIT_S}
    return _environment(None).get_template("epilog.sh.j2").render(values)


class Unfit(ValueError):
    """A value that cannot stand where a template puts it."""


class Fit(str):
    """Text that a filter has made fit for the script, or that templates put together from such text."""


def _environment(own: Path | None) -> jinja2.Environment:
    """Ours first: `{% extends "sbatch.sh.j2" %}` means ours, whatever a user's own file is called."""
    loaders: list[jinja2.BaseLoader] = [jinja2.FileSystemLoader(TEMPLATES)]
    if own is not None:
        loaders = [jinja2.FunctionLoader(_reader(own)), *loaders, jinja2.FileSystemLoader(own.parent)]
    environment = _Environment(
        loader=jinja2.ChoiceLoader(loaders),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalize,
    )
    environment.filters.update(sh=sh, sbatch_value=sbatch_value, verbatim=verbatim)
    return environment


class _Environment(jinja2.Environment):
    """What `super()`, a block or a macro puts together counts as fit, because all of its parts were."""

    concat = staticmethod(lambda parts: Fit("".join(parts)))


def _reader(own: Path) -> Callable[[str], tuple[str, str, None] | None]:
    def read(name: str) -> tuple[str, str, None] | None:
        if name != str(own):
            return None
        try:
            return own.read_text(encoding="utf-8"), str(own), None
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError([Problem(f"cannot be read: {error}", file=str(own))]) from None

    return read


def _finalize(value: Any) -> Any:
    """Jinja2 calls it for every `{{ ... }}`."""
    if isinstance(value, (Fit, int, jinja2.Undefined)):
        return value
    raise Unfit(f"the value {str(value)[:40]!r} needs a filter: |sh for the shell, |sbatch_value in #SBATCH lines")


def sh(value: object) -> Fit:
    """One word of the shell, whatever it holds."""
    return Fit(shlex.quote(verbatim(value)))


def sbatch_value(value: object) -> Fit:
    """A value in an `#SBATCH` line."""
    try:
        return Fit(slurm_options.quoted(verbatim(value)))
    except ValueError as error:
        raise Unfit(f"{str(value)[:40]!r} {error}") from None


def verbatim(value: object) -> Fit:
    """Text as it is, where it is meant to be program text."""
    if isinstance(value, jinja2.Undefined):
        str(value)  # says what is undefined
    text = str(value)
    if "\0" in text or not _is_utf8(text):
        raise Unfit(f"{text[:40]!r} holds a NUL or what is no UTF-8, which a script cannot hold")
    return Fit(text)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _end_of(setup: str) -> str:
    """A line that ends the setup lines, and does not occur in them."""
    end = _END
    while end in setup:
        end += "_"
    return end


def _place(error: BaseException) -> tuple[str | None, int | None]:
    """File and line of the template in which the error arose: Jinja2 puts them into the traceback."""
    frames: Iterable[traceback.FrameSummary] = reversed(traceback.extract_tb(error.__traceback__))
    found = next((frame for frame in frames if not frame.filename.endswith(".py")), None)
    return (found.filename, found.lineno) if found else (None, None)
