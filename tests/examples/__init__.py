"""Tests of the models and data that users copy from."""
