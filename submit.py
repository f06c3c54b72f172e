"""`python submit.py JOB.yaml`: run a job, or hand it to a Ray cluster with --address. The same as `ltx-batch run`."""

import sys

try:
    from ltx_batch.cli import submit
except ModuleNotFoundError as error:
    print(f"{error} in {sys.executable}: `make install`, then `. .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(submit(sys.argv[1:]))
