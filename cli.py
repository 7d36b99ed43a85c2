"""Run replk from a checkout: python cli.py ARGS."""

from replk_deploy.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
