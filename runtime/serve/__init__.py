"""`ntf serve`: the detector over HTTP. Needs the extra "serve"; nothing else in `runtime` imports from here."""
