"""Doom as a world to walk through: ViZDoom with Freedoom's free maps, without a screen.

places   where one can be, in words, and where to begin
game     Game: one engine; Games: one for each map file
record   shots from a seed, films of them, and `replay`
"""
