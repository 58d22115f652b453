"""Drills: whole systems of real processes, of which some are killed, stopped, ended or added under load."""
