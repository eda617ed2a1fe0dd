"""The fused implementation of CFE, SFE and CSFE: all three are `scale * (CFE(x) + SFE(x))`, with a term left out."""
