"""`flora report`: one HTML page of one or more runs, which asks the network for nothing.

    gather.py                   run folders -> series: runs that differ by nothing but their seed are one
    facts.py  reference.py      what is worked out from a series: spreads, tables of clients, spectra; bytes of other ways to train
    figures.py  sections.py     plots (plotly); what is said, drawn and tabled of it, or why it cannot be
    render.py  page.html.j2  page.css  page.js     the page; everything that was read is text there, and nothing of it is markup
"""
from collections.abc import Sequence
from pathlib import Path

from flora.errors import RunError
from flora.files import write_text
from flora.page.gather import series_of
from flora.page.render import MARK, page
from flora.page.sections import sections

NAME = "report.html"


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the page of these run folders (or folders of `flora compare`) and returns its path.

    out: a .html file; None: report.html in the folder, where it is one, else in the current directory. A report that is there is
    replaced. Raises RunError for a folder that is no run or has no finished round, and for an out that cannot be written or is
    another file; ConfigError for a config.yaml that cannot be read.
    """
    places = [Path(folder).expanduser() for folder in folders]
    target = Path(out).expanduser() if out is not None else (places[0] if len(places) == 1 else Path()) / NAME
    found = series_of(places)
    _check(target)
    text = page(found, sections(found))
    try:
        write_text(target, text)
    except OSError as error:
        raise RunError(f"--out: expected a file that can be written; got {target} ({error.strerror or error})") from error
    return target


def _check(target: Path) -> None:
    """Raises RunError for a path that no page should go to."""
    if target.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"--out: expected a file whose name ends in .html; got {target}")
    if not target.parent.is_dir():
        raise RunError(f"--out: expected a file in a folder that exists; got {target}. Make {target.parent} first.")
    if target.is_dir():
        raise RunError(f"--out: expected a file; got the folder {target}")
    if target.exists() and MARK.encode() not in target.read_bytes()[:500]:
        raise RunError(f"--out: {target} exists and is no report of flora, so it is not written to. Choose another name.")
