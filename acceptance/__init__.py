"""Long checks of real engines: matrices whose results are committed and shown in the docs."""
