"""The Python API: submit a run, fork a role beside another while it runs, stop it, end the run.

python docs/examples/controller.py docs/examples/quickstart.yaml local
"""

import sys

import slurmfork


def main(spec: str, backend: str) -> None:
    run = slurmfork.submit(spec, backend=backend)
    try:
        status = run.wait("ready")
        print(f"{run.run_id} is {status.state} on {len(status.nodes)} nodes")
        children = run.fork("eval", target="rollout")
        for child in children:
            print(f"{child.worker} beside {child.target} on GPUs {child.gpus}, pid {child.pid} on {child.node}")
        reply = run.stop("eval")
        print(f"stopped {len(reply.stopped)}, {reply.survivors} survivors")
    finally:
        ended = run.cancel("the example is over")
        print(f"{run.run_id} is {ended.state}, {ended.survivors} survivors")


if __name__ == "__main__":
    main(*sys.argv[1:])
