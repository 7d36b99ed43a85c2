"""From a large-kernel training checkpoint to a proved, measured deployment.

Start reading at `pipeline`: one function per command, and the only module that joins the steps.

    cli, options, render   words on a terminal
    pipeline/       one function and one file per command
    proof, selftest how an edge is proved, and that the proof can fail
    workspace       the run folder: hashes, ancestors, verdicts
    report          results as Markdown and JSON
    checkpoint · inspect · fuse · verify · bisect · poison · export · evaluate   the steps of a file
    build · bench (lanes, measurement, quantiles, clocks) · compare · profile (sites, roofline) · doctor   of a runtime
    backends        one file per runtime, one contract; the sidecar of an engine
    models          the networks and the algebra of their fusion
    preprocess, images, precision, tf32, batch, machine, records, files, optional, progress, errors   the ground

Importing this package imports nothing else.
"""

__version__ = "0.1.0"
