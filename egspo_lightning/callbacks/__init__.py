"""Lightning callbacks: stage transition, evaluation, checkpoints and export, guards, and observers of training."""
