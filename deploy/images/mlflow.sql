-- MLflow's database and role. PostgreSQL's image runs this once, as the role espalier, when its volume is empty.
-- The role mlflow can open only its own database. The role espalier owns the server and can open both.
\getenv password MLFLOW_POSTGRES_PASSWORD
CREATE ROLE mlflow LOGIN PASSWORD :'password';
CREATE DATABASE mlflow OWNER mlflow;
REVOKE CONNECT ON DATABASE espalier, mlflow, postgres FROM PUBLIC;
