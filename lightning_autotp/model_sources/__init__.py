"""Models to plan, verify and estimate with, without weights."""
