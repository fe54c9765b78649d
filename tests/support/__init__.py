"""What tests share and is no test: tiny models and runs, fresh processes, faults, bad files.

Tests import it as `support`; it never imports a test.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
SCRIPTS = ROOT / "workflow" / "scripts"
