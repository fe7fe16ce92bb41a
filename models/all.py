"""Imports every module with records, so that `Base.metadata` knows all tables, for example in a migration."""

import models.comparison
import models.dataset
import models.idempotency
import models.job
import models.outbox
import models.project
import models.registry
import models.run
import models.view
import models.worker  # noqa: F401
