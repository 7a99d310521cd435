package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/relay/admin"
	"github.com/relais-mta/relais/relay/agent"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// progressEvery is how often export and import say how far they are.
const progressEvery = 2 * time.Second

// exportedFile stands in a data directory whose queue was exported. The mail
// belongs to whoever imports it, so serve does not start any more.
func exportedFile(dir string) string { return filepath.Join(dir, "exported.json") }

// exportedMark is the content of that file.
type exportedMark struct {
	Export ids.Message `json:"export"`
	File   string      `json:"file"`
	At     time.Time   `json:"at"`
}

func readMark(dir string) (m exportedMark, found bool, err error) {
	text, err := os.ReadFile(exportedFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return m, false, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &m)
	}
	return m, true, fault.Wrap(err, fault.Internal, "relais-relay.export", "%s cannot be read", exportedFile(dir))
}

// checkExported refuses to serve a queue that was exported.
func checkExported(dir string) error {
	m, found, err := readMark(dir)
	if err != nil || !found {
		return err
	}
	return fault.Field("relais-relay.serve", "data", "the queue of %s was exported to %s at %s: serving it would send its mail twice. Remove the folder store and %s to begin with an empty queue; remove only %s if the export was never imported",
		dir, m.File, m.At.UTC().Format(time.RFC3339), filepath.Base(exportedFile(dir)), filepath.Base(exportedFile(dir)))
}

// offlineQueue is the queue of a relay that does not run.
type offlineQueue struct {
	*queue.Queue
	store  *store.Store
	outbox *outbox.Outbox
}

func openOffline(ctx context.Context, dir string) (*offlineQueue, error) {
	doc, log := defaults(), slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	storeDir := filepath.Join(dir, "store")
	if _, err := os.Stat(storeDir); err != nil {
		return nil, fault.Wrap(err, fault.NotFound, "relais-relay", "%s holds no queue: name the data directory of a relay with --data", dir)
	}
	st, err := store.Open(ctx, store.Config{Dir: storeDir, Storage: doc.Storage, Logger: log})
	if err != nil {
		return nil, err
	}
	ob, err := outbox.Open(st, outbox.Config{MaxBytes: doc.Storage.MaxOutboxBytes, Logger: log})
	if err != nil {
		return nil, errors.Join(err, st.Close())
	}
	q, err := queue.Open(ctx, st, ob, queue.Config{Now: time.Now, ClockTrusted: func() bool { return false }, Policy: doc.Queue, MaxInbound: doc.Inbound.MaxStoredBytes, Undecided: true, Logger: log})
	if err != nil {
		ob.Close()
		return nil, errors.Join(err, st.Close())
	}
	return &offlineQueue{q, st, ob}, nil
}

func (q *offlineQueue) close() error {
	err := q.Close()
	q.outbox.Close()
	return errors.Join(err, q.store.Close())
}

func newQueueExport(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "export FILE", Short: "Write the queue of a stopped relay to a file that another one imports", Args: exactly(1),
		Long: `Write every message of the queue, with the states of its recipients and its
body, to FILE, which must not exist. The relay must not run: this is for the
disk of a relay that was evicted or whose machine is dead. The mail belongs to
whoever imports the file: serve does not start on this directory afterwards.
Bodies are in clear in the file. What was offered to another relay and not
answered is in the file too, in doubt: a relay that took it knows it when it
imports the file, any other one delivers it once more.`,
		Example: "  relais-relay queue export /mnt/edge-7.queue --data /var/lib/relais/relay",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			count, err := exportQueue(cmd.Context(), o, args[0])
			if err != nil {
				return err
			}
			if o.json {
				return json.NewEncoder(os.Stdout).Encode(count)
			}
			fmt.Printf("messages    %d\nrecipients  %d\nbytes       %d\n", count.Messages, count.Recipients, count.Bytes)
			if count.InDoubt > 0 {
				fmt.Printf("in doubt    %d recipients: they may have it already, from this relay or from one that it was being handed over to\n", count.InDoubt)
			}
			if count.Damaged > 0 {
				return fault.New(fault.Invalid, "relais-relay.export", "%d messages were left out because they cannot be read; the rest is in %s", count.Damaged, args[0])
			}
			return nil
		},
	}
}

func exportQueue(ctx context.Context, o *options, path string) (count queue.ExportCount, err error) {
	const op = "relais-relay.export"
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return count, fault.Field(op, "file", "%s exists: name a new file", path)
	}
	if runs(o.data) {
		return count, fault.New(fault.Conflict, op, "the relay of %s runs and delivers what would be exported: drain it to hand its mail over, or stop it for good and export then; queue list --json says what is there", o.data)
	}
	member, err := agent.LoadMembership(o.data)
	if err != nil {
		return count, err
	}
	mark, again, err := readMark(o.data)
	if err != nil {
		return count, err
	}
	q, err := openOffline(ctx, o.data)
	if err != nil {
		return count, err
	}
	defer func() { err = errors.Join(err, q.close()) }()
	if !again { // an export made again is the same one, so that it is not imported twice
		mark.Export = ids.NewMessage(time.Now())
	}
	mark.At = time.Now().UTC().Truncate(time.Second)
	if mark.File, err = filepath.Abs(path); err != nil {
		mark.File = path
	}
	text, err := json.Marshal(mark)
	if err == nil {
		err = pki.WriteFile(exportedFile(o.data), append(text, '\n'), 0o600)
	}
	if err != nil {
		return count, fault.Wrap(err, fault.Internal, op, "%s cannot be written", exportedFile(o.data))
	}
	partial := path + ".partial"
	f, err := os.OpenFile(partial, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return count, fault.Wrap(err, fault.Internal, op, "%s cannot be written", partial)
	}
	say := progress("exported")
	err = q.EndOffers()
	if err == nil {
		count, err = q.Export(f, queue.ExportHeader{Export: mark.Export, Cluster: member.Cluster, Node: member.Node, CreatedAt: mark.At},
			func(c queue.ExportCount) { say(c.Messages, c.Bytes) },
			func(id ids.Message, err error) { fmt.Fprintf(os.Stderr, "left out: %s: %s\n", id, fault.Public(err)) })
	}
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(partial, path)
	}
	return count, fault.Wrap(err, fault.KindOf(err), op, "the queue was not exported to %s: %s", path, fault.Public(err))
}

// progress returns a function that says on standard error, now and then, how
// far it is.
func progress(what string) func(messages int, bytes int64) {
	next := time.Now().Add(progressEvery)
	return func(messages int, bytes int64) {
		if now := time.Now(); now.After(next) {
			next = now.Add(progressEvery)
			fmt.Fprintf(os.Stderr, "%s %d messages, %d bytes\n", what, messages, bytes)
		}
	}
}

func newQueueImport(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "import FILE", Short: "Take the exported queue of another relay into this one's", Args: exactly(1),
		Long: `Take the messages of an exported queue into the queue of this relay, whether it
runs or not, under their own ids and with the states of their recipients. The
whole file is checked first. A message that is in the queue, or was imported
from this export before, is left alone: an import that broke off is repeated.`,
		Example: "  relais-relay queue import /mnt/edge-7.queue --data /var/lib/relais/relay",
		RunE: func(cmd *cobra.Command, args []string) error {
			count, err := importQueue(cmd.Context(), o, args[0])
			if err != nil {
				return err
			}
			if o.json {
				return json.NewEncoder(os.Stdout).Encode(count)
			}
			fmt.Printf("imported       %d\nknown already  %d\nbytes          %d\n", count.Imported, count.Known, count.Bytes)
			return nil
		},
	}
}

func importQueue(ctx context.Context, o *options, path string) (count queue.ImportCount, err error) {
	const op = "relais-relay.import"
	f, err := os.Open(path)
	if err != nil {
		return count, fault.Wrap(err, fault.NotFound, op, "%s cannot be read", path)
	}
	defer f.Close()
	header, _, err := queue.CheckExport(f)
	if err != nil {
		return count, err
	}
	member, err := agent.LoadMembership(o.data)
	if err != nil {
		return count, err
	}
	switch {
	case header.Cluster != member.Cluster:
		return count, fault.Field(op, "file", "it is of cluster %s, this relay belongs to %s: import it at a relay of its own cluster", header.Cluster, member.Cluster)
	case header.Node == member.Node:
		return count, fault.Field(op, "file", "it is this relay's own queue: import it at another relay")
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return count, fault.Wrap(err, fault.Internal, op, "%s cannot be read again", path)
	}
	socket := filepath.Join(o.data, admin.SocketName)
	if conn, dialErr := net.Dial("unix", socket); dialErr == nil {
		_ = conn.Close() // it runs
		return sendExport(ctx, socket, f)
	}
	q, err := openOffline(ctx, o.data)
	if err != nil {
		return count, err
	}
	defer func() { err = errors.Join(err, q.close()) }()
	say := progress("imported")
	return q.Import(ctx, f, filepath.Join(o.data, admin.ImportsDir), func(c queue.ImportCount) { say(c.Imported+c.Known, c.Bytes) })
}

// counted says how much of a file was sent.
type counted struct {
	io.Reader
	sent int64
	say  func(int, int64)
}

// Read implements io.Reader.
func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.sent += int64(n)
	c.say(0, c.sent)
	return n, err
}

// sendExport hands an export to the running relay.
func sendExport(ctx context.Context, socket string, f io.Reader) (count queue.ImportCount, err error) {
	const op = "relais-relay.import"
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://relay/v1/queue/import", &counted{Reader: f, say: progress("sent")})
	if err != nil {
		return count, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return count, fault.Wrap(err, fault.Unavailable, op, "the relay broke off the import: repeat it to go on")
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err != nil {
		return count, fault.Wrap(err, fault.Unavailable, op, "the relay broke off its answer: repeat the import to go on")
	}
	if resp.StatusCode != http.StatusOK {
		var p admin.Problem
		if json.Unmarshal(body, &p) == nil && p.Detail != "" {
			return count, fault.New(fault.Invalid, op, "%s", p.Detail)
		}
		return count, fault.New(fault.Internal, op, "the relay answered %s", resp.Status)
	}
	return count, json.Unmarshal(body, &count)
}
