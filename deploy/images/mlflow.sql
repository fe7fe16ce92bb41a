-- MLflow's database and role. PostgreSQL's image runs this once, as the owner of ours, when its volume is empty.
-- Neither role can open the other's database; ours may, since it owns the server.
\getenv password MLFLOW_POSTGRES_PASSWORD
CREATE ROLE mlflow LOGIN PASSWORD :'password';
CREATE DATABASE mlflow OWNER mlflow;
REVOKE CONNECT ON DATABASE espalier, mlflow, postgres FROM PUBLIC;
