"""The pieces of ``repfusion_env.teachers.train``."""
