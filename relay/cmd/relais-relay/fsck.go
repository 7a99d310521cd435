package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/relay/admin"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
)

// quarantineDir is where a repair puts what cannot be delivered any more.
func quarantineDir(dir string) string { return filepath.Join(dir, "quarantine") }

func newQueueFsck(o *options) *cobra.Command {
	var cfg queue.FsckConfig
	var list bool
	cmd := &cobra.Command{
		Use: "fsck", Short: "Check the records of the queue, and repair those of a stopped relay", Args: exactly(0),
		Long: `Check every record of the queue against the others. Exit status 0 says that all
is well, 1 that something was found, repaired or not. While the relay runs it
checks itself, as the queue stood when the check began, beside the mail and with
half of a processor at most; it can be interrupted at any time.

With --repair the queue of a relay that is stopped is put in order. No mail is lost by that: a message that
cannot be delivered any more, because its envelope or body is damaged, is moved
to the folder quarantine of the data directory, with its text as far as it can
be read (.eml) and a description (.json). Send such a text again with any client,
or remove the files. --list shows what is there. Of a damaged file of the index
what can be read is used; the folder quarantine/index has the file as it was.

Notes are what a crash may leave behind and a start clears up by itself.
--json prints one object a line: findings, then the counts.`,
		Example: "  relais-relay queue fsck --data /var/lib/relais/relay\n  relais-relay queue fsck --repair --bodies --json\n  relais-relay queue fsck --list",
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := json.NewEncoder(os.Stdout)
			if list {
				return listQuarantine(o, out)
			}
			cfg.Events, cfg.Quarantine, cfg.Now = true, quarantineDir(o.data), time.Now
			cfg.Report = func(f queue.Finding) { printFinding(o, out, f) }
			cfg.Progress = fsckProgress()
			online := !cfg.Repair && runs(o.data)
			check := fsckOffline
			if online {
				check = fsckOnline
			}
			count, err := check(cmd.Context(), o, cfg)
			if err != nil {
				return err
			}
			return printFsck(os.Stdout, o, out, cfg.Repair, online, &count)
		},
	}
	cmd.Flags().BoolVar(&cfg.Repair, "repair", false, "repair what is found, and move aside what cannot be repaired")
	cmd.Flags().BoolVar(&cfg.Bodies, "bodies", false, "read every message and compare its checksum")
	cmd.Flags().BoolVar(&list, "list", false, "list what repairs have moved aside")
	return cmd
}

// fsckOffline checks the queue of a relay that does not run.
func fsckOffline(ctx context.Context, o *options, cfg queue.FsckConfig) (count queue.FsckCount, err error) {
	if runs(o.data) {
		return count, fault.New(fault.Conflict, "relais-relay.fsck", "the relay of %s runs, and a repair needs a queue at rest: stop it, repair, start it again; without --repair it is checked while it runs", o.data)
	}
	dir := filepath.Join(o.data, "store")
	if _, err := os.Stat(dir); err != nil {
		return count, fault.Wrap(err, fault.NotFound, "relais-relay.fsck", "%s holds no queue: name the data directory of a relay with --data", o.data)
	}
	cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	salvage := ""
	if cfg.Repair {
		salvage = filepath.Join(cfg.Quarantine, "index")
	}
	st, err := store.Open(ctx, store.Config{Dir: dir, Storage: defaults().Storage, Logger: cfg.Logger, Inspect: true, Salvage: salvage})
	if err != nil {
		return count, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	return queue.Fsck(ctx, st, cfg)
}

// fsckOnline has a running relay check its queue.
func fsckOnline(ctx context.Context, o *options, cfg queue.FsckConfig) (count queue.FsckCount, err error) {
	var last admin.FsckLine
	err = stream(ctx, o, http.MethodPost, "/v1/queue/fsck", &admin.Fsck{Bodies: cfg.Bodies}, func(b []byte) error {
		last = admin.FsckLine{}
		if err := json.Unmarshal(b, &last); err != nil {
			return err
		}
		switch {
		case last.Finding != nil:
			cfg.Report(*last.Finding)
		case last.Progress != nil:
			cfg.Progress(*last.Progress)
		}
		return nil
	})
	const op = "relais-relay.fsck"
	switch {
	case ctx.Err() != nil:
		err = fault.New(fault.Unavailable, op, "interrupted: the check has not come to its end; begin it again at any time")
	case err == nil && last.Error != "":
		err = fault.New(fault.Unavailable, op, "%s", last.Error)
	case err == nil && last.Result == nil:
		err = fault.New(fault.Unavailable, op, "the relay broke off its answer: the check has not come to its end")
	case err == nil:
		count = *last.Result
	}
	return count, err
}

// fsckLine is one line of the output with --json.
type fsckLine struct {
	Finding *queue.Finding   `json:"finding,omitempty"`
	Result  *queue.FsckCount `json:"result,omitempty"`
}

func printFinding(o *options, out *json.Encoder, f queue.Finding) {
	if o.json {
		_ = out.Encode(fsckLine{Finding: &f}) // a closed pipe: nobody reads on
		return
	}
	where := ""
	switch {
	case f.Recipient != nil:
		where = f.Recipient.String()
	case f.Message != nil:
		where = f.Message.String()
	case f.Queue != 0:
		where = fmt.Sprintf("work queue %d", f.Queue)
	case f.Rule != nil:
		where = f.Rule.String()
	case f.File != "":
		where = "file " + f.File
	default:
		where = "record " + f.Key
	}
	kind := string(f.Kind)
	if f.Note {
		kind = "note: " + kind
	}
	done := ""
	if f.Repaired {
		done = " (repaired)"
	}
	fmt.Printf("%s: %s: %s%s\n", kind, where, f.Detail, done)
}

// fsckProgress returns a function that says on standard error, now and then,
// how far the check is.
func fsckProgress() func(queue.FsckCount) {
	next := time.Now().Add(progressEvery)
	return func(c queue.FsckCount) {
		if now := time.Now(); now.After(next) {
			next = now.Add(progressEvery)
			fmt.Fprintf(os.Stderr, "looked at %d records, found %d\n", c.Records, c.Total())
		}
	}
}

// printFsck prints what was found in all. Anything found is an error, so that
// the exit status tells.
func printFsck(w io.Writer, o *options, out *json.Encoder, repair, online bool, c *queue.FsckCount) error {
	const op = "relais-relay.fsck"
	if o.json {
		if err := out.Encode(fsckLine{Result: c}); err != nil {
			return fault.Wrap(err, fault.Internal, op, "the result cannot be written")
		}
	} else {
		files := fmt.Sprintf(", body files %d", c.BodyFiles)
		if online {
			files = "" // the store looks after them
		}
		fmt.Fprintf(w, "messages %d, open recipients %d (%d waiting, %d held, %d attempts without an end), inbound mails %d, work queues %d%s\n",
			c.Messages, c.Recipients, c.Waiting, c.Held, c.InDoubt, c.Inbound, c.Queues, files)
	}
	switch n := c.Total(); {
	case n == 0 && c.Clean:
		return nil
	case online:
		return fault.New(fault.Invalid, op, "%d places are damaged: stop the relay, run it again with --repair, start it again", n)
	case !repair:
		return fault.New(fault.Invalid, op, "%d places are damaged: run it again with --repair", n)
	case !c.Clean:
		return fault.New(fault.Internal, op, "%d places were damaged, and not all could be repaired: keep a copy of %s, export the queue and import it elsewhere", n, o.data)
	case c.MovedAside > 0:
		return fault.New(fault.Invalid, op, "%d places were damaged and are repaired; %d messages or records are in %s now", n, c.MovedAside, quarantineDir(o.data))
	default:
		return fault.New(fault.Invalid, op, "%d places were damaged and are repaired", n)
	}
}

// listQuarantine shows what repairs have moved aside.
func listQuarantine(o *options, out *json.Encoder) error {
	n := 0
	err := queue.ListQuarantine(quarantineDir(o.data), func(q queue.Quarantined) {
		n++
		if o.json {
			_ = out.Encode(q) // a closed pipe: nobody reads on
			return
		}
		name := q.Message
		for key := range q.Records {
			if name == "" {
				name = "record " + key
			}
		}
		fmt.Printf("%s  %s  %s: %s\n", q.At.Format(time.RFC3339), name, q.Reason, q.Detail)
		if q.Body != "" {
			fmt.Printf("    text %s (whole: %t)\n", filepath.Join(quarantineDir(o.data), q.Body), q.Whole)
		}
		if q.Envelope == nil {
			return
		}
		for _, r := range q.Envelope.Recipients {
			fmt.Printf("    from <%s> to <%s>, %s\n", q.Envelope.Sender, r.Address, r.State)
		}
	})
	if err == nil && n == 0 && !o.json {
		fmt.Println("Nothing was moved aside.")
	}
	return err
}
