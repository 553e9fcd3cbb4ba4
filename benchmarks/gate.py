"""No speed is reported on a red gate: the operator's own tests run first."""
import os
import subprocess
import sys


def require_green(*tests: str) -> None:
    """Runs these test files; leaves with their output where one fails. $FLORA_GREEN=1: they have just passed (make gpu sets it)."""
    if os.environ.get("FLORA_GREEN") == "1":
        return
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
        sys.exit(f"the tests of what would be measured fail ({' '.join(tests)}); nothing is measured")
