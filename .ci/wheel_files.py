"""Compare a wheel's files with what git tracks of its packages."""

import subprocess
import sys
import zipfile

PACKAGES = {"refattn/": "refattn/", "backends/refattn_cpu/": "refattn_cpu/"}

listing = subprocess.run(["git", "ls-files", "-z", *PACKAGES], check=True, capture_output=True, text=True).stdout
tracked = {
    packed + path.removeprefix(source)
    for path in listing.split("\0")
    for source, packed in PACKAGES.items()
    if path.startswith(source)
}
with zipfile.ZipFile(sys.argv[1]) as wheel:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
if packed != tracked:
    sys.exit(f"missing from the wheel: {sorted(tracked - packed)}; not tracked: {sorted(packed - tracked)}")
print(f"{len(packed)} files, as tracked")
