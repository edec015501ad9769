"""Geometry: which part of a full tensor each tensor parallel rank holds."""
