"""Importers: one file for each foreign layout, from its bytes to fdk's canonical parts, exactly."""
