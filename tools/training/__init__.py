"""Training of Kestrel from single photographs: pairs with known homographies are made on the device, batch by batch."""
