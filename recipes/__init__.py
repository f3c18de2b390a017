"""Programs: they parse, build and call. Nothing imports them but themselves."""
