// Package agent is a relay's tie to control. It joins the cluster, keeps the
// relay's certificate fresh, holds the link, and keeps the view: received,
// checked, written to disk and only then put in use, so that a relay that was
// restarted without control works on from what it knew. Everything else in the
// relay reads the view through one atomic pointer and never waits for control.
package agent
