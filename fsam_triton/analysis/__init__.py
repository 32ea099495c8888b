"""Sharpness measures, Hessian eigenvalues and landscapes of the loss; mask densities; weights rounded to few bits."""

from .density import mask_density as mask_density
from .density import plot_mask_density as plot_mask_density
from .hessian import hessian_eigenvalues as hessian_eigenvalues
from .landscape import Landscape as Landscape
from .landscape import loss_landscape as loss_landscape
from .landscape import plot_landscape as plot_landscape
from .landscape import plot_landscapes as plot_landscapes
from .mean_loss import Loss as Loss
from .rho import RhoSearch as RhoSearch
from .rho import find_rho as find_rho
from .rho import plot_rho_search as plot_rho_search
from .rounding import round_to_nearest as round_to_nearest
from .rounding import rounded_weights as rounded_weights
from .sharpness import m_sharpness as m_sharpness
from .sharpness import worst_case_sharpness as worst_case_sharpness
