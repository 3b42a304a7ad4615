"""A worker that forks a role beside itself, over its agent's Unix socket, and says when it is ready."""

import signal

import slurmfork


def main() -> None:
    me = slurmfork.current()
    me.ready("serving")
    children = me.fork("helper", command=["sleep", "infinity"])
    print(f"{me.name} has {children[0].worker} beside it, pid {children[0].pid}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
