"""When tickets pay: every arm of the papers as a configuration of `ebdiff run`, counted honestly; see ../README.md."""
