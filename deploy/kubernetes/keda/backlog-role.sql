-- A role for KEDA, or any autoscaler: it may read the view `backlog`, counts and seconds, and no table. Run it by the
-- schema's owner if it has CREATEROLE, else by a superuser, after `stoker migrate`; safe to repeat, and then it sets the password anew:
--   BACKLOG_PASSWORD=… psql -X -v ON_ERROR_STOP=1 -f backlog-role.sql postgresql://…/stoker
\getenv password BACKLOG_PASSWORD
BEGIN;
SELECT 'CREATE ROLE stoker_backlog' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'stoker_backlog') \gexec
-- KEDA keeps a few connections for each trigger.
ALTER ROLE stoker_backlog LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE CONNECTION LIMIT 20 PASSWORD :'password';
ALTER ROLE stoker_backlog SET statement_timeout = '10s';
ALTER ROLE stoker_backlog SET default_transaction_read_only = on;
GRANT USAGE ON SCHEMA public TO stoker_backlog;
GRANT SELECT ON backlog TO stoker_backlog;
COMMIT;
