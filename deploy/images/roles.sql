-- The databases and roles of Espalier and MLflow. PostgreSQL's image runs this once, as the superuser, when its volume is
-- empty. Each role owns its own database and can open no other. The superuser has no password afterwards, so that it can only
-- be used inside the container: docker compose exec postgres psql -U postgres
\set ON_ERROR_STOP on
\getenv espalier_password POSTGRES_PASSWORD
\getenv mlflow_password MLFLOW_POSTGRES_PASSWORD
CREATE ROLE espalier LOGIN PASSWORD :'espalier_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE espalier OWNER espalier;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE CONNECT ON DATABASE espalier, mlflow, postgres FROM PUBLIC;
ALTER ROLE postgres PASSWORD NULL;
