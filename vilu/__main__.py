"""`python -m vilu`, which torchrun needs."""

try:
    from vilu.cli import main
except ImportError:
    import vilu

    if getattr(vilu, "__file__", None):
        raise
    # Python takes a folder of that name for a package, such as a clone of the repository in the current folder.
    raise SystemExit("vilu: a folder 'vilu' here hides the installed package; start Python in another folder") from None

main()
