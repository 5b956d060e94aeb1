"""Parts of networks: modules over token grids ``(B, *grid, C)`` and images ``(B, C, *spatial)`` of any rank."""
