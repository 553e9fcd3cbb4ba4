"""Numbers as a person reads them, with their units."""
import math

NOTHING = "–"
STEPS = ("", "k", "M", "G", "T", "P")


def quantity(value: float | None, unit: str) -> str:
    """Three digits and a factor of 1000: 1.25 MB, 361 M; bytes are those of 10^3."""
    if value is None or not math.isfinite(value):
        return NOTHING
    step = 0
    while abs(value) >= 999.5 and step < len(STEPS) - 1:
        value, step = value / 1000, step + 1
    digits = 0 if step == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {STEPS[step]}{unit}".rstrip()


def duration(seconds: float | None) -> str:
    """12.3 s, 4 min 05 s, 2 h 10 min; below a tenth of a second in ms."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 0.0995:
        return f"{1000 * seconds:.1f} ms" if seconds >= 0.00005 else "0 s"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


def plain(value: float | None, form: str = ".4f") -> str:
    """A number in a format of Python's; a dash where there is none."""
    return NOTHING if value is None or not math.isfinite(value) else format(value, form)


def whole(value: float | None) -> str:
    return plain(value, ",.0f") if value is None or value == int(value) else plain(value, ",.1f")
