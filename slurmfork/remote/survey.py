"""What a Python over there is: run there, by that Python itself, before anything of ours is. Standard library alone.

It may be an old one, which has to be able to read this far to say so: nothing here is newer than Python 3.6.
"""

import json
import os
import platform
import sys
import sysconfig


def facts() -> "dict[str, object]":
    """All that the choice of wheels depends on, and what was put there before."""
    home = os.path.expanduser("~")  # noqa: PTH111
    top = os.path.join(home, ".slurmfork")  # noqa: PTH118
    venvs = os.path.join(top, "venvs")  # noqa: PTH118
    complete = []
    if os.path.isdir(venvs):  # noqa: PTH112
        complete = [name for name in os.listdir(venvs) if os.path.exists(os.path.join(venvs, name, ".complete"))]  # noqa: PTH110, PTH118, PTH208
    link = os.path.join(top, "venv")  # noqa: PTH118
    current = os.path.basename(os.readlink(link)) if os.path.islink(link) else ""  # noqa: PTH114, PTH115, PTH119
    version = sys.version_info
    implementation = sys.implementation
    return {
        "version": list(version[:3]),
        "executable": sys.executable,
        "base": os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
        "machine": platform.machine(),
        "libc": _libc(),
        "abiflags": getattr(sys, "abiflags", ""),
        "home": home,
        "complete": complete,
        "current": current,
        "markers": {
            "os_name": os.name,
            "sys_platform": sys.platform,
            "platform_machine": platform.machine(),
            "platform_system": platform.system(),
            "platform_release": platform.release(),
            "platform_version": platform.version(),
            "platform_python_implementation": platform.python_implementation(),
            "python_version": ".".join(platform.python_version_tuple()[:2]),
            "python_full_version": platform.python_version(),
            "implementation_name": implementation.name,
            "implementation_version": ".".join(map(str, implementation.version[:3])),
        },
    }


def _libc() -> "list[str]":
    """[name, version] of the C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, ValueError, OSError):
        name = version = ""
    if name == "glibc":
        return [name, version]
    return ["musl" if "musl" in (sysconfig.get_config_var("SOABI") or "") else "", ""]


if __name__ == "__main__":
    sys.stdout.write("\0slurmfork\0" + json.dumps(facts()) + "\0")
