-- For volumes of earlier versions, in which the role espalier is the superuser. Run it once while only postgres runs, in the
-- database espalier as the role espalier (docs/deploy.md). Afterwards all is as roles.sql makes it in a new volume: the
-- superuser is called postgres, and espalier is an ordinary role that owns its database. No row is changed.
\set ON_ERROR_STOP on
\getenv espalier_password POSTGRES_PASSWORD
-- A role cannot rename itself.
CREATE ROLE renaming SUPERUSER LOGIN;
\connect - renaming
ALTER ROLE espalier RENAME TO postgres;
CREATE ROLE espalier LOGIN PASSWORD :'espalier_password';
ALTER DATABASE espalier OWNER TO espalier;
-- Not REASSIGN OWNED, which refuses the superuser that PostgreSQL was set up with. Indexes and sequences of columns belong
-- to whoever owns their table.
SELECT format('ALTER TABLE public.%I OWNER TO espalier', tablename) FROM pg_tables WHERE schemaname = 'public' \gexec
REVOKE CONNECT ON DATABASE espalier, postgres FROM PUBLIC;
\connect - postgres
DROP ROLE renaming;
ALTER ROLE postgres PASSWORD NULL;
