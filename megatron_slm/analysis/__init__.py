"""Looking at runs and models: reports of runs, which tokens are kept, how tokens are learnt, and evaluation."""
