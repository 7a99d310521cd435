package cluster

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	walmetrics "github.com/hashicorp/raft-wal/metrics"
	"github.com/hashicorp/raft-wal/verifier"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// raftDir is the folder of the data directory that raft owns.
const raftDir = "raft"

// damagedRemedy is what helps a server whose log or snapshots cannot be read.
const damagedRemedy = "in a cluster of several servers, move the data directory away and join again; with one server restore the last backup"

// stores are the parts of raft that live on disk: log and votes in a
// write-ahead log, snapshots as files. The verifier in front of the log compares
// what is read back with what was written, from one StateHash to the next.
type stores struct {
	stable    stable
	verifier  *verifier.LogStore
	logs      raft.LogStore
	snapshots raft.SnapshotStore
}

// openStores opens the log of a data directory. fail is called when it cannot be
// written any more.
func openStores(dir string, logger *slog.Logger, report verifier.ReportFn, fail func(error)) (*stores, error) {
	const op = "cluster.openStores"
	base := filepath.Join(dir, raftDir)
	walDir := filepath.Join(base, "log")
	if err := os.MkdirAll(walDir, 0o700); err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "the folder %s cannot be made", walDir)
	}
	if err := checkSpace(base); err != nil {
		return nil, err
	}
	hlog := newRaftLogger(logger)
	w, err := wal.Open(walDir, wal.WithLogger(hlog), wal.WithSegmentSize(segmentBytes))
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "the raft log in %s cannot be opened. If another server runs on it, stop that; if it is damaged, %s", walDir, damagedRemedy)
	}
	toDisk := writer{base, fail}
	marked, err := openMarked(base, w, toDisk)
	if err != nil {
		return nil, closeAfter(w, err)
	}
	snapshots, err := raft.NewFileSnapshotStoreWithLogger(base, retainedSnapshots, hlog)
	if err != nil {
		return nil, fault.Wrap(closeAfter(marked, err), fault.Internal, op, "the snapshots in %s cannot be opened", base)
	}
	s := &stores{stable: stable{w, toDisk}, snapshots: snapshots}
	s.verifier = verifier.NewLogStore(marked, isCheckpoint, report, &walmetrics.NoOpCollector{})
	s.logs, err = raft.NewLogCache(logCacheEntries, s.verifier)
	if err != nil {
		s.close()
		return nil, fault.Wrap(err, fault.Internal, op, "the log cache cannot be made")
	}
	return s, nil
}

func closeAfter(c closer, err error) error {
	if closeErr := c.Close(); closeErr != nil {
		return fmt.Errorf("%w (and on closing: %w)", err, closeErr)
	}
	return err
}

// close closes the verifier and with it the log.
func (s *stores) close() { _ = s.verifier.Close() } // nothing is buffered: every append was synced

// isCheckpoint marks the entries at which the verifier compares sums.
func isCheckpoint(l *raft.Log) (bool, error) {
	return l.Type == raft.LogCommand && command.IsCheckpoint(l.Data), nil
}

// verified hears what the verifier found.
func (c *Cluster) verified(r verifier.VerificationReport) {
	if r.Err == nil {
		c.metrics.verifiedEntries.Add(float64(r.Range.End - r.Range.Start))
		return
	}
	if r.Err == verifier.ErrRangeMismatch {
		c.logger.Info("a range of the log was not verified: its beginning is gone", "range", r.Range.String())
		return
	}
	c.metrics.damagedRanges.Inc()
	err := fault.Wrap(r.Err, fault.Internal, "cluster.verified", "the raft log on disk is damaged in %s: replace this server's disk and let it join again", r.Range)
	c.logger.Error("this server stops serving", "error", err)
	c.unsound.Store(&err)
}
