"""`python submit.py JOB.yaml`: run a job, or hand it to a Ray cluster with --address. The same as `ltx-batch run`."""

import sys

from ltx_batch.cli import submit

if __name__ == "__main__":
    sys.exit(submit(sys.argv[1:]))
