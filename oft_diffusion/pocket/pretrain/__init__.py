"""How the pocket base and the classifier that reads its pictures are made from nothing."""
