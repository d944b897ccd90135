"""Imported by denoising_diffusion_pytorch, and used only where FID is asked for."""
