"""Are the machines ready for a run?"""
