"""What a model, a loss and data must be for anything to be measured, and how they are held.

Everything that measures or trains goes through this room.
"""
