package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/control/backup"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
)

const (
	backupTimeout         = 10 * time.Minute // for a backup to be taken and sent
	maxRecoveryKeyBytes   = 1 << 10
	backupBufferBytes     = 256 << 10
	backupPartialSuffix   = ".partial"
	recoveryKeyFileNotice = "file that holds the recovery key that init printed; - reads standard input"
)

// backupOutput is a manifest as the command line shows it.
type backupOutput struct {
	File     string          `json:"file"`
	Manifest backup.Manifest `json:"manifest"`
	Verified bool            `json:"verified"`
}

func (o backupOutput) print(w io.Writer) error {
	m := o.Manifest
	return printPairs(w, "File", o.File, "Cluster", m.Cluster.String(), "Generation", fmt.Sprint(m.Generation), "Index", fmt.Sprint(m.Index), "Taken", when(m.CreatedAt),
		"State", fmt.Sprintf("%d bytes, hash %s", m.StateBytes, m.StateHash), "Key", m.KEKID, "Needs", fmt.Sprintf("version %d of the commands (written by release %s)", m.FSMVersion, m.Version), "Verified", yes(o.Verified))
}

func (a *app) backupCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "backup FILE",
		Short: "Take a backup of the cluster, or verify one",
		Long: `Take a backup of the whole replicated state into FILE, which must not exist.
The server restores it into a scratch state and compares the hash before it
sends it. It is encrypted under the cluster's key-encryption key: the recovery
key that init printed opens it. The leader keeps one an hour besides, under
backups in its data directory.`,
		Example: "  relais-control backup /srv/backups/relais-2026-01-31\n  relais-control backup verify /srv/backups/relais-2026-01-31 --recovery-key-file key.txt",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			out, err := a.takeBackup(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.showBackup(cmd, out)
		},
	}
	cmd.AddCommand(a.backupVerify())
	return cmd
}

func (a *app) showBackup(cmd *cobra.Command, out backupOutput) error {
	if a.json {
		return printJSON(cmd.OutOrStdout(), out)
	}
	return out.print(cmd.OutOrStdout())
}

// takeBackup writes the file under another name first, so that a file with the
// right name is whole.
func (a *app) takeBackup(ctx context.Context, path string) (out backupOutput, err error) {
	const op = "relais-control.backup"
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return out, fault.Field(op, "file", "%s exists: name a new file", path)
	}
	c, err := a.client()
	if err != nil {
		return out, err
	}
	partial := path + backupPartialSuffix
	f, err := os.OpenFile(partial, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return out, fault.Wrap(err, fault.Internal, op, "%s cannot be written", partial)
	}
	defer func() {
		_ = f.Close()
		if err != nil {
			_ = os.Remove(partial) // the first error is the one to show
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, backupTimeout)
	defer cancel()
	if err := c.download(ctx, "/backup", f); err != nil {
		return out, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return out, fault.Wrap(err, fault.Internal, op, "%s cannot be read back", partial)
	}
	archive, err := backup.Open(bufio.NewReaderSize(f, backupBufferBytes))
	if err != nil {
		return out, err
	}
	if err := archive.CheckSum(); err != nil {
		return out, fault.Wrap(err, fault.Unavailable, op, "the backup did not arrive whole: try again")
	}
	if err := errors.Join(f.Sync(), os.Rename(partial, path), syncFolder(filepath.Dir(path))); err != nil {
		return out, fault.Wrap(err, fault.Internal, op, "%s cannot be written", path)
	}
	return backupOutput{File: path, Manifest: archive.Manifest, Verified: true}, nil
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// download sends a GET to the servers in turn and writes the first good answer.
func (c *client) download(ctx context.Context, path string, w io.Writer) error {
	deadline := time.Now().Add(leaderWait)
	long := *c.http
	long.Timeout = 0 // the context bounds it
	for {
		var last error
		for _, endpoint := range c.file.Endpoints {
			retry, err := fetch(ctx, &long, endpoint+api.Prefix+path, c.file.Key, w)
			if err == nil || !retry {
				return err
			}
			last = err
		}
		if time.Now().After(deadline) {
			return last
		}
		select {
		case <-time.After(leaderRetryPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func fetch(ctx context.Context, h *http.Client, target, key string, w io.Writer) (retry bool, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return false, err
	}
	r.Header.Set("Authorization", "Bearer "+key)
	resp, err := h.Do(r)
	if err != nil {
		var dial *net.OpError
		return errors.As(err, &dial) && dial.Op == "dial", err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= http.StatusBadRequest {
		text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
		if err != nil {
			return false, err
		}
		return refusal(resp.StatusCode, text)
	}
	_, err = io.Copy(w, resp.Body)
	return false, fault.Wrap(err, fault.Unavailable, "relais-control.backup", "the backup did not arrive whole: try again")
}

// openingKey says where the key that opens a backup comes from.
type openingKey struct {
	kekFile      string
	recoveryFile string
}

func (k *openingKey) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&k.kekFile, "kek", "", "key file of a server of that cluster: identity/kek.key of its data directory")
	cmd.Flags().StringVar(&k.recoveryFile, "recovery-key-file", "", recoveryKeyFileNotice)
	cmd.MarkFlagsMutuallyExclusive("kek", "recovery-key-file")
}

// open returns the key-encryption key of the backup's cluster.
func (k *openingKey) open(cmd *cobra.Command, m backup.Manifest) (pki.Key, error) {
	if k.recoveryFile == "" {
		kek, err := pki.LoadKey(k.kekFile)
		if fault.Is(err, fault.NotFound) {
			err = fault.Wrap(err, fault.NotFound, "relais-control", "%s does not exist: name the key that opens the backup with --kek or --recovery-key-file", k.kekFile)
		}
		return kek, err
	}
	const op = "relais-control"
	from := cmd.InOrStdin()
	if k.recoveryFile != "-" {
		f, err := os.Open(k.recoveryFile)
		if err != nil {
			return pki.Key{}, fault.Wrap(err, fault.NotFound, op, "%s cannot be read", k.recoveryFile)
		}
		defer f.Close()
		from = f
	}
	text, err := io.ReadAll(io.LimitReader(from, maxRecoveryKeyBytes))
	if err != nil {
		return pki.Key{}, fault.Wrap(err, fault.Internal, op, "the recovery key cannot be read")
	}
	return ca.Recover(ca.Material{RecoverySealed: m.RecoverySealed}, m.Cluster, strings.TrimSpace(string(text)))
}

func (a *app) backupVerify() *cobra.Command {
	var key openingKey
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Restore a backup into a scratch state and compare its hash",
		Long: `Decrypt the backup, restore it into a scratch state in memory and compare hash
and index with what its manifest says. The key is the key file of a server (by
default the one in the data directory) or the recovery key.`,
		Example: "  relais-control backup verify /srv/backups/relais-2026-01-31 --data /var/lib/relais/control\n  relais-control backup verify /srv/backups/relais-2026-01-31 --recovery-key-file key.txt --json",
		Args:    cobra.ExactArgs(1),
	}
	key.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if key.kekFile == "" {
			key.kekFile = paths{a.dataDir}.kek()
		}
		archive, closeFile, err := openBackup(args[0])
		if err != nil {
			return err
		}
		defer closeFile()
		kek, err := key.open(cmd, archive.Manifest)
		if err != nil {
			return err
		}
		if _, err := archive.Restore(kek); err != nil {
			return err
		}
		return a.showBackup(cmd, backupOutput{File: args[0], Manifest: archive.Manifest, Verified: true})
	}
	return cmd
}

func openBackup(path string) (*backup.Archive, func(), error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, fault.Wrap(err, fault.NotFound, "relais-control.backup", "%s cannot be read", path)
	}
	archive, err := backup.Open(bufio.NewReaderSize(f, backupBufferBytes))
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return archive, func() { _ = f.Close() }, nil
}
