package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

func (a *app) domainCommand() *cobra.Command {
	body := map[string]string{}
	add := &cobra.Command{
		Use: "add DOMAIN --tenant TENANT", Short: "Add a sending domain and print the DNS records to publish",
		Example: "  relais-control domain add example.com --tenant acme\n  relais-control domain add example.com --tenant acme --return-path bounce.example.com --zone",
		Args:    cobra.ExactArgs(1),
	}
	reason := reasonFlag(add)
	tenant := add.Flags().String("tenant", "", "tenant, id or name")
	returnPath := add.Flags().String("return-path", "", "domain of the return paths (default: rp.DOMAIN)")
	selector := add.Flags().String("selector", "", "DKIM selector (default: r and today's date)")
	zone := add.Flags().Bool("zone", false, "print the records in zone-file syntax and nothing else")
	add.RunE = func(cmd *cobra.Command, args []string) error {
		if *tenant == "" {
			return usagef("--tenant is missing")
		}
		body["tenant"], body["name"] = *tenant, args[0]
		if *returnPath != "" {
			body["return_path"] = *returnPath
		}
		if *selector != "" {
			body["selector"] = *selector
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/domains", body: body, reason: *reason}, printDomain(*zone))
	}
	shown := &cobra.Command{Use: "show DOMAIN", Short: "Show a domain and the DNS records to publish", Example: "  relais-control domain show example.com --zone >> example.com.zone", Args: cobra.ExactArgs(1)}
	zoneToo := shown.Flags().Bool("zone", false, "print the records in zone-file syntax and nothing else")
	shown.RunE = func(cmd *cobra.Command, args []string) error {
		return show(a, cmd, call{method: http.MethodGet, path: "/domains/" + url.PathEscape(args[0])}, printDomain(*zoneToo))
	}
	ls := &cobra.Command{Use: "list", Short: "List sending domains", Example: "  relais-control domain list --tenant acme", Args: cobra.NoArgs}
	of := ls.Flags().String("tenant", "", "only those of this tenant, id or name")
	ls.RunE = func(cmd *cobra.Command, _ []string) error {
		return list(a, cmd, "/domains", tenantQuery(*of), "NAME TENANT RETURN-PATH SELECTORS VERIFIED", func(d api.Domain) []string {
			return []string{d.Name, d.TenantName, d.ReturnPath, strings.Join(d.Selectors, ","), whenOr(d.VerifiedAt, "no")}
		})
	}
	return group("domain", "Add, list, show and check sending domains", add, ls, shown, a.domainCheck(), a.domainDKIM())
}

// printDomain prints a domain with its records, or the records alone.
func printDomain(zone bool) func(io.Writer, api.Domain) error {
	return func(w io.Writer, d api.Domain) error {
		if zone {
			for _, r := range d.Records {
				if _, err := fmt.Fprintln(w, r.Zone); err != nil {
					return err
				}
			}
			return nil
		}
		if err := printPairs(w, "Domain", d.Name, "Tenant", d.TenantName, "Return path", d.ReturnPath, "Selectors", strings.Join(d.Selectors, ", "), "Ownership seen", whenOr(d.VerifiedAt, "never")); err != nil {
			return err
		}
		if len(d.Keys) > 0 {
			fmt.Fprintln(w, "\nDKIM keys:")
			if err := printKeys(w, d.Keys); err != nil {
				return err
			}
		}
		for _, required := range []bool{true, false} {
			heading := "\nPublish these records:"
			if !required {
				heading = "\nRecommended:"
			}
			fmt.Fprintln(w, heading)
			for _, r := range d.Records {
				if r.Required == required {
					fmt.Fprintf(w, "\n  %s\n  %s %s\n", r.Purpose, r.Type, r.Name)
					for _, v := range r.Values {
						fmt.Fprintf(w, "    %s\n", v)
					}
				}
			}
		}
		for _, n := range d.Notes {
			fmt.Fprintf(w, "\nNote: %s.\n", n)
		}
		return nil
	}
}

func (a *app) ipCommand() *cobra.Command {
	print := printIP
	var body api.IPAdd
	add := &cobra.Command{
		Use: "add ADDRESS --ehlo NAME", Short: "Add a source address, and assign it if a relay or pool is named",
		Example: "  relais-control ip add 198.51.100.7 --ehlo mta7.example.net --node edge-7 --pool default\n  relais-control ip add 10.0.0.7 --public 198.51.100.7 --ehlo mta7.example.net",
		Args:    cobra.ExactArgs(1),
	}
	reason := reasonFlag(add)
	add.Flags().StringVar(&body.EHLO, "ehlo", "", "name said in EHLO; it must lead to the public address")
	add.Flags().StringVar(&body.Public, "public", "", "address the world sees, with 1:1 NAT (default: the same)")
	add.Flags().StringVar(&body.PTR, "ptr", "", "name its PTR record gives (default: the EHLO name)")
	add.Flags().BoolVar(&body.Floating, "floating", false, "the address can move between machines: its relay uses it by a lease of two minutes, and it is free by itself when that relay is silent")
	add.Flags().StringVar(&body.Node, "node", "", "relay that gets it, id or name")
	add.Flags().StringVar(&body.Pool, "pool", "", "pool it joins, id or name")
	add.RunE = func(cmd *cobra.Command, args []string) error {
		if body.EHLO == "" {
			return usagef("--ehlo is missing: the name that the address's PTR record gives")
		}
		body.Bind = args[0]
		return show(a, cmd, call{method: http.MethodPost, path: "/ips", body: body, reason: *reason}, print)
	}
	var to api.IPAssign
	assign := &cobra.Command{
		Use: "assign ADDRESS [--node NODE] [--pool POOL]", Short: "Assign an address to a relay, a pool, or both",
		Example: "  relais-control ip assign 198.51.100.7 --node edge-7\n  relais-control ip assign 198.51.100.7 --pool acme-dedicated",
		Args:    cobra.ExactArgs(1),
	}
	why := reasonFlag(assign)
	assign.Flags().StringVar(&to.Node, "node", "", "relay that gets it, id or name")
	assign.Flags().StringVar(&to.Pool, "pool", "", "pool it joins, id or name")
	assign.Flags().BoolVar(&to.OldOwnerIsOff, "old-owner-is-off", false, "your word that the machine that held the address is switched off")
	expect := assign.Flags().Uint64("expect", 0, "revision of the address that the change is made from")
	assign.RunE = func(cmd *cobra.Command, args []string) error {
		if to.Node == "" && to.Pool == "" {
			return usagef("name --node, --pool, or both")
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/ips/" + url.PathEscape(args[0]) + "/assign", body: to, ifMatch: revisionText(cmd, *expect), reason: *why}, print)
	}
	ls := &cobra.Command{Use: "list", Short: "List source addresses", Example: "  relais-control ip list --json", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return list(a, cmd, "/ips", nil, "BIND PUBLIC EHLO POOL NODE STATE PRESENT REVERSE LEASE UNUSED", func(i api.IP) []string {
			present := ""
			if i.Present != nil {
				present = yes(*i.Present)
			}
			return []string{i.Bind, i.Public, i.EHLO, i.PoolName, i.NodeName, i.State, present, reverseText(i), leaseText(i), i.Unused}
		})
	}}
	shown := &cobra.Command{Use: "show ADDRESS", Short: "Show a source address, by itself or by its id", Example: "  relais-control ip show 198.51.100.7", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		return show(a, cmd, call{method: http.MethodGet, path: "/ips/" + url.PathEscape(args[0])}, print)
	}}
	return group("ip", "Add, list, show, assign, check, release and quarantine source addresses", add, ls, shown, assign, a.ipCheck(), a.ipOverride(), a.ipRelease(), a.ipReassign(), a.ipQuarantine(), a.ipUnquarantine())
}

// revisionText returns the value of --expect if it was given.
func revisionText(cmd *cobra.Command, revision uint64) string {
	if !cmd.Flags().Changed("expect") {
		return ""
	}
	return strconv.FormatUint(revision, 10)
}

func (a *app) poolCommand() *cobra.Command {
	print := func(w io.Writer, p api.Pool) error {
		return printPairs(w, "Id", p.ID, "Name", p.Name, "Kind", p.Kind, "Tenant", p.Tenant, "Addresses", strings.Join(p.IPs, ", "))
	}
	var body api.PoolAdd
	add := &cobra.Command{Use: "add NAME", Short: "Add a pool", Example: "  relais-control pool add eu\n  relais-control pool add acme-own --tenant acme", Args: cobra.ExactArgs(1)}
	reason := reasonFlag(add)
	add.Flags().StringVar(&body.Kind, "kind", "", "shared or dedicated (default: dedicated if a tenant is named)")
	add.Flags().StringVar(&body.Tenant, "tenant", "", "owner of a dedicated pool, id or name")
	add.RunE = func(cmd *cobra.Command, args []string) error {
		body.Name = args[0]
		return show(a, cmd, call{method: http.MethodPost, path: "/pools", body: body, reason: *reason}, print)
	}
	return group("pool", "Add, list and show pools", add,
		&cobra.Command{Use: "list", Short: "List pools", Example: "  relais-control pool list", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			return list(a, cmd, "/pools", nil, "ID NAME KIND TENANT ADDRESSES", func(p api.Pool) []string {
				return []string{p.ID, p.Name, p.Kind, p.Tenant, fmt.Sprint(len(p.IPs))}
			})
		}},
		&cobra.Command{Use: "show POOL", Short: "Show a pool, by id or name", Example: "  relais-control pool show default", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			return show(a, cmd, call{method: http.MethodGet, path: "/pools/" + url.PathEscape(args[0])}, print)
		}})
}

func (a *app) policyCommand() *cobra.Command {
	return group("policy", "Get, compare, put and roll back the policy", a.policyGet(), a.policyDiff(), a.policyPut(), a.policyRollback(), a.policyHistory(), a.policyStatus(), a.policyWhy())
}

func (a *app) policyGet() *cobra.Command {
	cmd := &cobra.Command{
		Use: "get [SECTION]", Short: "Print the policy, or one section of it, as TOML",
		Long:    "Print the policy as it holds: each section as it was put, or the shipped default. With --dir each section becomes a file that policy put takes back.",
		Example: "  relais-control policy get\n  relais-control policy get queue > queue.toml\n  relais-control policy get --dir policy/",
		Args:    cobra.MaximumNArgs(1),
	}
	dir := cmd.Flags().String("dir", "", "write one file per section into this directory")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		adapt := func(p *api.Policy) error {
			if len(args) == 1 {
				p.Sections = slices.DeleteFunc(p.Sections, func(s api.PolicySection) bool { return s.Name != args[0] })
				if len(p.Sections) == 0 {
					return fault.Field("relais-control", args[0], "is not a section of the policy: use %s", strings.Join(policy.SectionNames(), ", "))
				}
			}
			if *dir == "" {
				return nil
			}
			return writeSections(*dir, *p)
		}
		return showAdapted(a, cmd, call{method: http.MethodGet, path: "/policy"}, adapt, func(w io.Writer, p api.Policy) error {
			if *dir != "" {
				_, err := fmt.Fprintf(w, "%d sections of policy revision %d written to %s\n", len(p.Sections), p.Revision, *dir)
				return err
			}
			for i, s := range p.Sections {
				if len(args) == 0 {
					origin := "put by an operator"
					if s.Default {
						origin = "shipped default"
					}
					fmt.Fprintf(w, "# section %s, %s, policy revision %d\n", s.Name, origin, p.Revision)
				}
				fmt.Fprint(w, s.Text)
				if i < len(p.Sections)-1 {
					fmt.Fprintln(w)
				}
			}
			return nil
		})
	}
	return cmd
}

func writeSections(dir string, p api.Policy) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fault.Wrap(err, fault.Internal, "relais-control", "the directory %s cannot be made", dir)
	}
	for _, s := range p.Sections {
		path := filepath.Join(dir, s.Name+".toml")
		if err := os.WriteFile(path, []byte(s.Text), 0o644); err != nil {
			return fault.Wrap(err, fault.Internal, "relais-control", "%s cannot be written", path)
		}
	}
	return nil
}

func (a *app) policyPut() *cobra.Command {
	cmd := &cobra.Command{
		Use: "put FILE… | DIR", Short: "Change sections of the policy",
		Long: `Change sections of the policy. A file's name without .toml is its section;
a directory stands for the *.toml files in it. An empty file returns a section
to the shipped default. Everything is checked before anything changes. The
impact is printed first, and the command waits for connected relays to apply
the change; it fails if one refuses it.

With --expect the change is made only if the policy is still at that revision.`,
		Example: "  relais-control policy put queue.toml\n  relais-control policy put policy/ --expect 41 --reason 'slower retries'",
		Args:    cobra.MinimumNArgs(1),
	}
	reason := reasonFlag(cmd)
	expect := cmd.Flags().Uint64("expect", 0, "revision of the policy that the change is made from")
	dry := cmd.Flags().Bool("dry-run", false, "say what it would do and change nothing")
	wait := addWaitFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		sections, err := readSections(args)
		if err != nil {
			return err
		}
		preview := api.PolicyPreviewRequest{Sections: sections}
		if *dry {
			return show(a, cmd, call{method: http.MethodPost, path: "/policy/preview", body: preview}, printPreview)
		}
		return a.changePolicy(cmd, preview, call{method: http.MethodPut, path: "/policy", body: api.PolicyPut{Sections: sections}, ifMatch: revisionText(cmd, *expect), reason: *reason}, wait)
	}
	return cmd
}

// readSections reads the named files and the *.toml files of named directories.
func readSections(args []string) (map[string]string, error) {
	const op = "relais-control.policy"
	var files []string
	for _, arg := range args {
		info, err := os.Stat(arg)
		if err != nil {
			return nil, fault.Wrap(err, fault.NotFound, op, "%s cannot be read", arg)
		}
		if !info.IsDir() {
			files = append(files, arg)
			continue
		}
		inside, err := filepath.Glob(filepath.Join(arg, "*.toml"))
		if err != nil || len(inside) == 0 {
			return nil, fault.Field(op, arg, "holds no *.toml file")
		}
		files = append(files, inside...)
	}
	sections := map[string]string{}
	for _, path := range files {
		name, ok := strings.CutSuffix(filepath.Base(path), ".toml")
		if !ok {
			return nil, fault.Field(op, path, "has no name of the form SECTION.toml; sections are %s", strings.Join(policy.SectionNames(), ", "))
		}
		if _, twice := sections[name]; twice {
			return nil, fault.Field(op, path, "section %s is named twice", name)
		}
		info, err := os.Stat(path)
		if err != nil || !info.Mode().IsRegular() || info.Size() > policy.MaxSectionBytes {
			return nil, fault.Field(op, path, "is not a file of at most %d bytes, the most that a section has", policy.MaxSectionBytes)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, fault.Wrap(err, fault.NotFound, op, "%s cannot be read", path)
		}
		sections[name] = string(text)
	}
	return sections, nil
}
