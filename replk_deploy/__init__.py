"""From a large-kernel training checkpoint to a proved, measured deployment.

Start reading at `pipeline`: one function per command, and the only module that joins the steps.

    cli, render     words on a terminal
    pipeline        one function per command
    proof, selftest how an edge is proved, and that the proof can fail
    workspace       the run folder: hashes, ancestors, verdicts
    report          results as Markdown and JSON
    checkpoint · inspect · fuse · verify · bisect · poison · export · evaluate · bench   the steps
    backends        one file per runtime, one contract
    models          the networks and the algebra of their fusion
    preprocess, images, precision, machine, records, files, optional, progress, errors   the ground

Importing this package imports nothing else.
"""

__version__ = "0.1.0"
